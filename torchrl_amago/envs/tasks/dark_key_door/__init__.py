"""Dark Key-To-Door: find an invisible key, then an invisible door, again and again."""

from torchrl_amago.envs.tasks.dark_key_door.task import DarkKeyDoor

__all__ = ["DarkKeyDoor"]
