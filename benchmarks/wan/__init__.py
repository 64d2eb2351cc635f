"""Links between network namespaces that are as slow and as long as they are told (Linux, root)."""
