"""Translations between impala's core and other people's programs."""
