"""Benchmarks; a package, so that the `benchmarks` that Opacus installs is not taken for it."""
