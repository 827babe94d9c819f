"""HTTP in the gateway's event loop: a listener, and what happens around every call it takes.

What the calls are is up to others: the console has routes of its own (services/gateway/console).
"""
