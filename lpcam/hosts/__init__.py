"""Published methods that LPCAM is plugged into, a file each; the plain classifier is a model."""
