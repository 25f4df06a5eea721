"""fiddler_opt: profiles a machine and a model's routing, and solves for the plan that `fiddler_run`
executes.
"""
