"""Maintenance: checks, repair, backups, removal, compaction, disk usage and snapshots."""
