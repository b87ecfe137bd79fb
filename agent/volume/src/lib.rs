//! Volumes: layers, maps, stacks and the engine that reads and writes them.
