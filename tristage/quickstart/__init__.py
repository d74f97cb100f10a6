"""The quickstart: a made-up task whose answers a rule can grade, and a network small enough for one core."""
