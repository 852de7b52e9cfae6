"""Where weights live: whole in every process, in FSDP2's shards, in ZeRO-3's partitions."""
