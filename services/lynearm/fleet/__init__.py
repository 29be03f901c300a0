"""Trace servers of one catalog as Ray actors: placed on nodes, started again, drained and taken away.

Public names, imported from their modules so that reading a configuration loads neither gRPC nor Ray:
`config.FleetConfig`; `fleet.Fleet`, `fleet.FleetStatus` and `fleet.take_down`; `ray_cluster.connect`.
"""
