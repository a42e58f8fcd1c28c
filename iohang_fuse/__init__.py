"""iohang-fuse: a passthrough file system that holds failed disk I/O until the storage is back."""

__version__ = "0.1.0"
