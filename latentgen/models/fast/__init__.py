"""The same networks, faster on this processor: leaf modules and small blocks of the unchanged diffusers network swapped after loading."""
