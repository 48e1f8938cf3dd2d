"""Tuning by TRL: supervised fine-tuning and direct preference optimisation; a small policy from scratch."""
