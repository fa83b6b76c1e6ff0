"""One quota, one circuit and one budget for many processes and machines, on Valkey or Redis."""
