"""The files of an export: packages, rows, manifest, README."""
