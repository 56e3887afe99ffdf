"""One model on several processes: rank 0's side, the other ranks' process, their messages."""
