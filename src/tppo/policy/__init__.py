"""The policy: generation, supervised fine-tuning, and sampling of responses to be labelled."""
