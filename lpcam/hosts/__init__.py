"""Hosts that LPCAM is plugged into beside the plain classifier, one file a method."""
