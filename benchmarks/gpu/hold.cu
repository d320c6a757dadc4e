// Holds a GPU back from inside llama-server's process, so that it runs like a smaller one:
//     nvcc -O2 -shared -Xcompiler -fPIC -o hold.so hold.cu
//     LD_PRELOAD=./hold.so HOLD=0000:07:00.0=hold.txt llama-server …
// keeps as many SMs of that device (its PCI id, as nvidia-smi prints it) busy as hold.txt says, with short kernels whose blocks
// take a whole SM's shared memory each. The file is read again several times a second, so the hold can change while a model is
// loaded. Only in llama-servers that load a model: not in those that list devices, nor in the shell script that starts one. Of
// several that see the device the one that started last holds it: two processes take turns, which would hold it back twice.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include <unistd.h>

static std::atomic<bool> ended{false};

__global__ void spin(long long cycles) {
  extern __shared__ char memory[];
  if (threadIdx.x == 0) memory[0] = 1;
  const long long start = clock64();
  while (clock64() - start < cycles) __nanosleep(500);
}

static bool loads_a_model() {
  char path[4096];
  const ssize_t bytes = readlink("/proc/self/exe", path, sizeof path - 1);
  path[bytes > 0 ? bytes : 0] = 0;
  const char *slash = strrchr(path, '/');
  if (!slash || strncmp(slash + 1, "llama-server", strlen("llama-server"))) return false;
  FILE *file = fopen("/proc/self/cmdline", "r");
  char word[4096];
  size_t length = 0;
  bool found = false;
  for (int c; file && (c = fgetc(file)) != EOF;) {
    if (length + 1 < sizeof word) word[length++] = (char)c;
    if (c == 0) {
      found = found || strcmp(word, "--model") == 0;
      length = 0;
    }
  }
  if (file) fclose(file);
  return found;
}

static int number_in(const std::string &path) {
  int number = 0;
  if (FILE *file = fopen(path.c_str(), "r")) {
    if (fscanf(file, "%d", &number) != 1) number = 0;
    fclose(file);
  }
  return number;
}

static int sms_in(const std::string &path) { return number_in(path + ".last") == getpid() ? number_in(path) : 0; }

static void claim(const std::string &path) {
  if (FILE *file = fopen((path + ".last").c_str(), "w")) {
    fprintf(file, "%d\n", getpid());
    fclose(file);
  }
}

static void hold(std::string pci_id, std::string path) {
  const char *given = getenv("HOLD_CYCLES");
  const long long cycles = given ? atoll(given) : 1000000LL;
  const int shared_bytes = 220 * 1024;
  int device;
  if (cudaDeviceGetByPCIBusId(&device, pci_id.c_str()) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return;  // not visible
  claim(path);
  cudaFuncSetAttribute(spin, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  int least, greatest;
  cudaDeviceGetStreamPriorityRange(&least, &greatest);
  cudaStream_t stream;
  cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest);
  cudaEvent_t done[2];
  for (cudaEvent_t &event : done) cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync);
  int sms = 0;
  for (long i = 0; !ended; i++) {  // two launches in flight, so that the SMs are never free
    if (i >= 2) cudaEventSynchronize(done[i & 1]);
    if (const int now = i % 256 ? sms : sms_in(path); now != sms)
      fprintf(stderr, "hold: %d SMs of device %d\n", sms = now, device);
    if (sms <= 0) {
      usleep(500);
      continue;
    }
    spin<<<sms, 32, shared_bytes, stream>>>(cycles);
    cudaEventRecord(done[i & 1], stream);
  }
}

__attribute__((constructor)) static void begin() {
  char pci_id[32], path[4096];
  const char *given = getenv("HOLD");
  if (given && sscanf(given, "%31[^=]=%4095[^\n]", pci_id, path) == 2 && loads_a_model())
    std::thread(hold, std::string(pci_id), std::string(path)).detach();
}

__attribute__((destructor)) static void end() { ended = true; }
