"""LPCAM for any torch classifier: as an object, on the command line, as files for use elsewhere."""
