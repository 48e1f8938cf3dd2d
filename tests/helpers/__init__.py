"""What several test files share: made-up runs, models, tokenizers, servers and oracles."""
