"""The wire contract, version 1: protobuf messages and the gRPC service, generated from the .proto files."""
