"""The driver: from a Dynamo graph to one whose attentions are kernels."""
