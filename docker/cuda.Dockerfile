# docker build -f docker/cuda.Dockerfile -t tradespace-cuda . ; docker run --rm --gpus all -v tradespace:/cache tradespace-cuda doctor
# torch's wheels carry CUDA's libraries; the driver is the host's (nvidia-container-toolkit)
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[engine,gpu,serve]"
ENV TRADESPACE_HOME=/cache HF_HOME=/cache/huggingface NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# whose the folder is must be settled before it becomes a volume: a new volume starts as a copy of it, and what is changed later may be lost
RUN useradd --create-home tradespace && mkdir -p /cache && chown tradespace /cache
VOLUME /cache
USER tradespace
ENTRYPOINT ["tradespace"]
CMD ["--help"]
