"""What users did: an interaction log becomes examples (readers, cleaning, privacy, windows, splits)."""
