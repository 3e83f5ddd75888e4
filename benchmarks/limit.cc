// The pooled step of benchmarks/peers.py by a program that knows the model, the optimizer and all
// shapes beforehand: what the machine can do. loss = mean(tanh(pooled @ w)), pooled[b] = sum of
// the rows of bag b.
//
//   g++ -std=c++20 -O3 -march=native -ffast-math -pthread -DFEATURES=64 limit.cc -o limit
//   ./limit OPTIMIZER ROWS BAGS LENGTH IDS [START]
//
// IDS is a file of int32 [batches, BAGS, LENGTH], START one of float32 [ROWS, FEATURES] and then
// [FEATURES], the table and w (without it they are made up). A line of stdin is the number of a
// batch, answered by the seconds of the step and its loss, or "save PATH": START as it is now.

#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

constexpr int D = FEATURES;
constexpr float RATE = 1e-3f, B1 = 0.9f, B2 = 0.999f, EPS = 1e-8f, ADAGRAD_EPS = 1e-7f;
enum Rule { SGD, ADAGRAD, ROWWISE, ADAM };
const std::vector<std::string> NAMES = {"sgd", "adagrad", "row-wise adagrad", "adam"};

// Big arrays lie in huge pages where the machine has them.
float* fresh(size_t n, float value) {
  const size_t page = 1 << 21, bytes = (n * sizeof(float) + page - 1) / page * page;
  float* x = static_cast<float*>(std::aligned_alloc(page, bytes));
  madvise(x, bytes, MADV_HUGEPAGE);
  std::fill(x, x + n, value);
  return x;
}

// A row p [D] with gradient g [D]; m and v are its moments, one v for the row where row-wise.
template <Rule R>
void update(float* p, float* m, float* v, const float* g, float rate, float v_scale) {
  if constexpr (R == ROWWISE) {
    float sum = 0;
    for (int k = 0; k < D; k++) sum += g[k] * g[k];
    *v += sum / D;
    rate /= std::sqrt(*v) + ADAGRAD_EPS;
  }
  for (int k = 0; k < D; k++) {
    if constexpr (R == SGD || R == ROWWISE) p[k] -= rate * g[k];
    if constexpr (R == ADAGRAD) {
      v[k] += g[k] * g[k];
      p[k] -= rate * g[k] / std::sqrt(v[k] + ADAGRAD_EPS);
    }
    if constexpr (R == ADAM) {
      m[k] = B1 * m[k] + (1 - B1) * g[k];
      v[k] = B2 * v[k] + (1 - B2) * g[k] * g[k];
      p[k] -= rate * m[k] / (std::sqrt(v[k] * v_scale) + EPS);
    }
  }
}

struct Worker {  // its share of the distinct rows, and what it adds to the loss and to w's gradient
  std::vector<int32_t> rows, ends, bags;       // bags of row i: from ends[i] up to ends[i + 1]
  std::vector<std::pair<int32_t, int32_t>> seen;  // (place in rows, bag) of each id
  float loss, g_w[D];
};

template <Rule R>
struct Model {
  static constexpr int V_WIDTH = R == ROWWISE ? 1 : D;
  int64_t num_rows, bags, length, count = 0;
  float *table, *m = nullptr, *v = nullptr, w[D], m_w[D] = {}, v_w[D] = {};
  std::vector<float> cotangent;  // [bags, D], of the pooled rows
  std::vector<int32_t> place;    // [num_rows], -1 between steps
  std::vector<Worker> workers{std::max(1u, std::thread::hardware_concurrency())};
  std::barrier<> gate{static_cast<std::ptrdiff_t>(workers.size())};
  const int32_t* ids = nullptr;

  Model(int64_t num_rows, int64_t bags, int64_t length)
      : num_rows(num_rows), bags(bags), length(length), cotangent(bags * D), place(num_rows, -1) {
    const float first = R == ADAM ? 0.0f : 0.1f;
    table = fresh(num_rows * D, 0.01f);
    if (R == ADAM) m = fresh(num_rows * D, first);
    if (R != SGD) v = fresh(num_rows * V_WIDTH, first);
    for (int k = 0; k < D; k++) w[k] = 0.1f * (k % 5 - 2), v_w[k] = first;
  }

  // Each worker tells apart the ids of its own part of the table, a cache line of `place` at a
  // time, and sorts the bags in which they stand by row.
  void distinct(Worker& mine, int64_t number) {
    const int64_t all = workers.size();
    mine.rows.clear(), mine.seen.clear(), mine.ends.assign(1, 0);
    for (int64_t b = 0, i = 0; b < bags; b++)
      for (int64_t f = 0; f < length; f++, i++) {
        if (i + 16 < bags * length) __builtin_prefetch(&place[ids[i + 16]], 1);
        if ((ids[i] >> 4) % all != number) continue;
        int32_t& at = place[ids[i]];
        if (at < 0) at = mine.rows.size(), mine.rows.push_back(ids[i]), mine.ends.push_back(0);
        mine.ends[at + 1]++, mine.seen.emplace_back(at, b);
      }
    for (size_t i = 1; i < mine.ends.size(); i++) mine.ends[i] += mine.ends[i - 1];
    mine.bags.resize(mine.seen.size());
    for (auto x = mine.seen.rbegin(); x != mine.seen.rend(); x++)
      mine.bags[--mine.ends[x->first + 1]] = x->second;
    mine.ends.erase(mine.ends.begin()), mine.ends.push_back(mine.bags.size());
    for (int32_t row : mine.rows) place[row] = -1;
  }

  void forward(Worker& mine, int64_t number) {
    mine.loss = 0, std::fill(mine.g_w, mine.g_w + D, 0.0f);
    const int64_t all = workers.size(), first = bags * number / all;
    const int64_t end = bags * (number + 1) / all;
    for (int64_t b = first, i = first * length; b < end; b++) {
      float pooled[D] = {}, z = 0;
      for (int64_t f = 0; f < length; f++, i++) {
        if (i + 16 < end * length) touch(table + int64_t(ids[i + 16]) * D);
        const float* row = table + int64_t(ids[i]) * D;
        for (int k = 0; k < D; k++) pooled[k] += row[k];
      }
      for (int k = 0; k < D; k++) z += pooled[k] * w[k];
      const float t = std::tanh(z), g = (1 - t * t) / bags;
      mine.loss += t / bags;
      for (int k = 0; k < D; k++) cotangent[b * D + k] = g * w[k], mine.g_w[k] += g * pooled[k];
    }
  }

  void backward(Worker& mine, float rate, float v_scale) {
    for (size_t i = 0; i < mine.rows.size(); i++) {
      if (i + 8 < mine.rows.size()) {
        const int64_t next = mine.rows[i + 8];
        touch(table + next * D);
        if (m) touch(m + next * D);
        if (v) V_WIDTH == 1 ? __builtin_prefetch(v + next, 1) : touch(v + next * V_WIDTH);
      }
      float g[D] = {};
      for (int32_t j = mine.ends[i]; j < mine.ends[i + 1]; j++)
        for (int k = 0; k < D; k++) g[k] += cotangent[int64_t(mine.bags[j]) * D + k];
      const int64_t row = mine.rows[i];
      update<R>(table + row * D, m + (m ? row * D : 0), v + (v ? row * V_WIDTH : 0), g, rate,
                v_scale);
    }
  }

  static void touch(const float* row) {
    for (int k = 0; k < D; k += 16) __builtin_prefetch(row + k, 1);
  }

  void update_w(float rate, float v_scale) {
    float g[D] = {};
    for (Worker& mine : workers)
      for (int k = 0; k < D; k++) g[k] += mine.g_w[k];
    if constexpr (R != ROWWISE) return update<R>(w, m_w, v_w, g, rate, v_scale);
    for (int k = 0; k < D; k++)  // its rows are its D numbers
      v_w[k] += g[k] * g[k], w[k] -= rate * g[k] / (std::sqrt(v_w[k]) + ADAGRAD_EPS);
  }

  void part(int64_t number) {  // what one thread does in a step
    const float rate = R == ADAM ? RATE / (1 - std::pow(B1, float(count))) : RATE;
    const float v_scale = R == ADAM ? 1 / (1 - std::pow(double(B2), double(count))) : 1;
    distinct(workers[number], number);
    forward(workers[number], number);
    gate.arrive_and_wait();
    if (number == 0) update_w(rate, v_scale);
    backward(workers[number], rate, v_scale);
    gate.arrive_and_wait();
  }

  void file(const std::string& path, std::ios::openmode mode) {
    std::fstream f(path, mode | std::ios::binary);
    for (auto [x, n] : {std::pair(table, num_rows * D), std::pair(w, int64_t(D))})
      if (mode == std::ios::in) f.read(reinterpret_cast<char*>(x), n * sizeof(float));
      else f.write(reinterpret_cast<char*>(x), n * sizeof(float));
    if (!f) std::cerr << "limit: " << path << " is too short or not there\n", std::exit(1);
  }

  void serve(const std::vector<int32_t>& batches) {
    std::vector<std::thread> threads;
    for (size_t number = 1; number < workers.size(); number++)
      threads.emplace_back([this, number] {
        while (gate.arrive_and_wait(), ids) part(number);
      });
    for (std::string line; std::getline(std::cin, line);) {
      if (line.starts_with("save ")) {
        file(line.substr(5), std::ios::out);
        std::cout << "saved" << std::endl;
        continue;
      }
      const auto start = std::chrono::steady_clock::now();
      ids = batches.data() + std::stoll(line) * bags * length, count++;
      gate.arrive_and_wait();
      part(0);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      float loss = 0;
      for (Worker& mine : workers) loss += mine.loss;
      std::cout << taken.count() << ' ' << loss << std::endl;
    }
    ids = nullptr, gate.arrive_and_wait();
    for (std::thread& thread : threads) thread.join();
  }
};

template <Rule R>
void run(char** arg, int args) {
  std::ifstream f(arg[5], std::ios::binary | std::ios::ate);
  std::vector<int32_t> batches(f.tellg() / sizeof(int32_t));
  f.seekg(0).read(reinterpret_cast<char*>(batches.data()), batches.size() * sizeof(int32_t));
  Model<R> model(std::stoll(arg[2]), std::stoll(arg[3]), std::stoll(arg[4]));
  if (args > 6) model.file(arg[6], std::ios::in);
  model.serve(batches);
}

int main(int args, char** arg) {
  const auto rule = args < 6 ? NAMES.end() : std::find(NAMES.begin(), NAMES.end(), arg[1]);
  if (rule == NAMES.end()) return std::cerr << "see the head of limit.cc\n", 1;
  (void(*[])(char**, int)){run<SGD>, run<ADAGRAD>, run<ROWWISE>, run<ADAM>}[rule - NAMES.begin()](
      arg, args);
}
