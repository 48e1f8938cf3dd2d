"""Token-level PPO. For a policy and rewards of your own see `tppo.rl.trainer` and examples/json_validity.py."""
