"""MeshServe: the Python client, the command line and the generated stubs.

What is public stands in public.py and is imported when it is first used: the services need the
stubs alone, and a health check none of it.
"""

TYPE_CHECKING = False  # as type checkers know it, without the import of `typing`

if TYPE_CHECKING:
    from meshserve.public import *  # noqa: F403
else:

    def __getattr__(name):
        import meshserve.public as public

        # With it come the modules that it is made of.
        for names in (vars(public), globals()):
            if name in names:
                return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return [*globals(), *__getattr__("__all__")]
