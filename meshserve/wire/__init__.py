"""The one place where typed values and protobuf messages meet, for both clients."""
