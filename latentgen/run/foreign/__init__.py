"""Pictures of other programs: what their recipes say, as requests of this one, and a note for everything that was not taken over. `read` begins."""
