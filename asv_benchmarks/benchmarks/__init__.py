"""Benchmarks of fastadam, for airspeed velocity."""
