"""The router: what a decision, a block and a stream cost, and fleets of emulated servers."""
