"""The samplers, each one short generator: (denoise, x, levels, *, noise, ...) -> Iterator[Step].

`steps` holds what they share; `one_step` those without a history, `multistep` those that keep past noise or past x0, `langevin` those that
walk at a fixed level. `latentgen.diffusion.sample` is the table of them all.
"""
