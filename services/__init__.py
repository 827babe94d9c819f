"""The services of the mesh and what they share."""

import os

# gRPC reads these when it is first imported. Its own log lines are no records of ours, and its fork
# handlers only serve programs that fork without exec, which no service does.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
