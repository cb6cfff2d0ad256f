"""A patch series, commit by commit: build, prove or run, coverage, verdict."""
