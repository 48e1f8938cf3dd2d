"""Tests, a folder for each room of the package; `helpers` is what several of them share."""
