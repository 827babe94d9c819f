"""Text to token ids, chat templates, incremental detokenization."""
