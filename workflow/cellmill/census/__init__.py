"""Censuses: the public one, private ones, and the demo's, all opened the same way."""
