"""The programs: a config turned into objects, the stages called in order, a run's own folder."""
