"""Devices and processes: the mesh, the sharding rules, and what the processes of a job agree on."""
