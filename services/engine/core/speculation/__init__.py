"""Speculative decoding: tokens guessed cheaply, and verified many in one step of the model."""
