"""The device side: the closed loop state -> plan -> infer, and what it leaves on disk."""
