"""The same work on several devices, in processes of this machine or of a cluster."""
