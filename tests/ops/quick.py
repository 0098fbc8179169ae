"""Fast compilation: most tests of ops compile for longer than they compute."""

import functools

import jax

QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
