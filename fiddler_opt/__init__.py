"""fiddler_opt: profiles a machine and a model's routing, and solves for a plan.

`fiddler_run` executes the plan.
"""
