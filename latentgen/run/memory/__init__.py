"""Will it fit, and how long will it take: a run on paper (`rehearsal`), what it needs (`forecast`), a plan that fits (`budget`), the way down from
there (`ladder`)."""
