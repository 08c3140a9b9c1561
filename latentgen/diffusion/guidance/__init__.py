"""Guidance beyond the plain rule: what is guided away from, how far, and what is done with the result.
`latentgen.diffusion.guide` has the plain rule.

`table` says which guiders there are, `combine` in which order they act, `rules` and `thresholds` have the formulas, `classify` follows a gradient,
`progress` tells a level's place in a run. None knows a prompt, family, sampler or device.
"""
