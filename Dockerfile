# The course in a container (not run in CI: no Docker there):
#   docker build -t self-forcing-course .
#   docker run --rm -p 8888:8888 self-forcing-course        # then open the address that it prints
# A GPU: docker run --gpus all ...; the pinned torch brings its CUDA libraries.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /course
COPY . .
RUN make setup
EXPOSE 8888
CMD [".venv/bin/jupyter", "lab", "notebooks", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--allow-root"]
