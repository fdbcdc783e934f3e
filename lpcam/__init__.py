"""LPCAM: class activation maps from non-discriminative features as well."""
