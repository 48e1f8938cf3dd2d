"""Answers: the local engine, the sampling of responses to be labelled, and answers without a policy."""
