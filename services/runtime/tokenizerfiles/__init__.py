"""What a model's files say of its tokenizer: its definition, and the bytes that tokens stand for.

The tokenizer service turns texts into token ids by it. The engine core, which holds a completion
to a grammar, needs to know what tokens spell and reads it from the same files in the same way.
"""
