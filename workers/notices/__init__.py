"""Notices that a machine is about to be taken away: where clouds say so, and the drain of its Ray nodes that follows."""
