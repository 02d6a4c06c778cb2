"""The life of what is stored: removal, compaction, figures of the disk, snapshots."""
