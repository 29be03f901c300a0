"""The trace service: accepts blocks, keeps them durably, and replays or relays them to any number of readers.

Public names, imported from their modules so that reading a configuration loads neither gRPC nor SQLAlchemy:
`config.ServeConfig`; `server.TraceServer` and `server.run_server`; `store.BlockStore` and
`store.LocalBlockStore`; `object_store.ObjectBlockStore`; `catalog.Catalog`, `sql_catalog.SqlCatalog`,
`sqlite.SqliteDatabase` and `postgresql.PostgresDatabase`.
"""
